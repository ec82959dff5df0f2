"""Partitioned architectures in torch, and the gates that freeze into smaller graphs."""
