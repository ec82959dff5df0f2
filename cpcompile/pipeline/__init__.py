"""The work of the commands, one page each."""
