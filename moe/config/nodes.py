"""How groups of experts lie on nodes. ``parallel.expert_nodes``."""

from moe.config.model import MoeConfig


def nodes_problem(nodes: int, expert_parallel: int, moe: MoeConfig) -> str | None:
    """Why experts cannot be spread over so many nodes, or why a limit on groups is none on nodes; None if all is well.

    Experts are spread in equal contiguous parts by id, over nodes as over ranks, so parts of two sizes nest where one
    number divides the other.
    """
    key = f"parallel.expert_nodes ({nodes})"
    if moe.num_experts == 0:
        return f"{key} has no effect, since model.moe.num_experts is 0; leave it out"
    if moe.num_experts % nodes:
        return f"{key} does not divide model.moe.num_experts ({moe.num_experts})"
    if nodes % expert_parallel and expert_parallel % nodes:
        return (
            f"{key} and parallel.expert_parallel ({expert_parallel}): a rank's experts would lie on two nodes; one of "
            "the two must divide the other"
        )
    if moe.top_groups < moe.num_groups and nodes % moe.num_groups and moe.num_groups % nodes:
        return (
            f"{key} and model.moe.num_groups ({moe.num_groups}): a group of experts would straddle nodes, so that "
            f"model.moe.top_groups limits none; set num_groups to {nodes} or a multiple of it"
        )
    return None
