"""Training over several processes, on torch.distributed alone: the mesh, launching, ZeRO, experts, context, stages."""
