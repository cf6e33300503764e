"""What is handed to torchrun."""

from torch.distributed.run import get_args_parser

from mmssl.distributed.launch import torchrun_arguments


def test_a_programs_own_options_reach_it() -> None:
    """torchrun's parser finds the module and passes on every word behind it, also those that its own options begin
    with or are called."""
    words = ["--data", "x", "--run", "runs/a", "--no-python", "--master", "1", "-m", "optim.lr=1"]
    parsed = get_args_parser().parse_args(torchrun_arguments(2, "mmssl.train", words))
    assert (parsed.module, parsed.nproc_per_node, parsed.standalone) == (True, "2", True)
    assert parsed.training_script == "mmssl.train"
    assert parsed.training_script_args == words
