"""Device memory under a real program's page accesses: traces, and the replay that moves bytes."""
