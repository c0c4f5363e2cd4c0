"""Several processes that run one model: its shards, collectives, and what all have to agree on."""
