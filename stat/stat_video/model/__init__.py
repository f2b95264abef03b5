"""The STAT network: configuration, blocks, multiply-adds, saving and loading."""
