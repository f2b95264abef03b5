"""Looking at models and data: attention maps, ablations, loader throughput, plots."""
