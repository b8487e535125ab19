"""Tensors of which each process holds a part (DTensors), and those that are whole."""

from torch import Tensor


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, which every process has, cut as `reference` is, if that is of the same shape and sharded."""
    if not hasattr(reference, "device_mesh") or reference.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    # Without a source rank nothing is sent: each process cuts its part out of its own copy.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The tensor in one piece. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
