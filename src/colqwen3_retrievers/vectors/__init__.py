"""Multi-vectors, MaxSim over them, their codes and compression, and the bridge to single vectors."""
