"""One file per command. What a command runs is imported inside its body, so that the command line starts fast."""
