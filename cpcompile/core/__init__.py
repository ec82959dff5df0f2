"""Used by all packages: configuration, errors, selections, common types."""
