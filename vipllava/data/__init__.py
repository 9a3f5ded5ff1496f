"""From shards to batches: manifests, records, pictures, the stream, collation.

Knows nothing about networks: what leaves this room is :class:`vipllava.types.Batch`.
"""
