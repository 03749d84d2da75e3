"""Training of seed, dense baseline and experts with DeepSpeed. Started by `deepspeed --module megaxelm.train` or `megaxelm train`."""
