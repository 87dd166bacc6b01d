"""One function a verb: its arguments are the flags, its docstring the help. Each imports what it needs when it runs."""
