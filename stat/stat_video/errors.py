"""The two kinds of failure that are the user's to mend, told in one sentence each."""


class UserError(Exception):
    """Something the user can put right, as a path or an option; the CLI exits with code 2."""


class VideoError(UserError):
    """A video that cannot be used: missing, not a video, corrupt, truncated or too short.

    The text is one sentence that names the file and what is wrong with it.
    """
