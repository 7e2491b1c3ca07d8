"""What `dsv3` does, one module per command: info, validate, demo, train."""


class UserError(Exception):
    """Something the user can put right: one line on stderr and exit code 2, no traceback."""
