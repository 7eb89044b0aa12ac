"""The state of a training run as named pieces of tensors in safetensors files, whatever the parallelism."""
