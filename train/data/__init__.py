"""Text as bytes: `sources` finds documents, `packing` makes windows of them, `pipeline` batches."""
