"""What holds for every test."""

import signal

# Started in the background of a script, a process ignores Ctrl-C, and hands that down to all it starts.
signal.signal(signal.SIGINT, signal.default_int_handler)
