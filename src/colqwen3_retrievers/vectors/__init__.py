"""Multi-vectors and what is computed from them: MaxSim, codes, compression, one vector of many."""
