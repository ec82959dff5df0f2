"""From a frozen graph to the files of one engine: one file per engine."""
