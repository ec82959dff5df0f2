"""What every room uses: configuration, errors, selections, common types."""
