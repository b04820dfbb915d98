"""What a job says when it is over: one plain dictionary, computed from rows, and ways to show it."""
