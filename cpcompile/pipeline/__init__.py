"""The work of the commands, a page each."""
