"""What crosses a process boundary: ids, messages, hashes, layouts, records, errors."""
