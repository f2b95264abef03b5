"""A small benchmark that needs time to solve: generated MP4 clips over real photographs."""
