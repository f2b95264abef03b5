"""A small generated benchmark of MP4 clips that can only be solved by using the order of frames."""
