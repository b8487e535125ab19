"""Tensors that may be sharded: each process holds a part of a DTensor, and all of any other tensor."""

from torch import Tensor


def like(reference: Tensor, tensor: Tensor) -> Tensor:
    """Shard `tensor`, which every process holds whole, like `reference`, if that is sharded and of the same shape."""
    if not hasattr(reference, "device_mesh") or reference.shape != tensor.shape:
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(reference, DTensor)
    # Without a source rank nothing is sent: each process takes its part from its own copy.
    return distribute_tensor(tensor, reference.device_mesh, reference.placements, src_data_rank=None)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def full(tensor: Tensor) -> Tensor:
    """The whole tensor. Every process must call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
