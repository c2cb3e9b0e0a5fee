"""What torch.compile has done in this process."""


def num_compiled_graphs() -> int:
    """Returns the number of graphs that torch.compile has compiled in this process."""
    from torch._dynamo.utils import counters  # takes more than a second to import

    return counters["stats"]["unique_graphs"]
