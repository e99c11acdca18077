"""Several processes of one run, as `accelerate launch` starts them."""

import socket


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launcher(processes: int) -> tuple[object, ...]:
    """Words after `python` that start a module so many times. --multi_gpu is what makes the launcher start several; the module's own
    --device cpu keeps them on the CPU."""
    return (
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", processes, "--num_machines", 1,
        "--main_process_port", free_port(), "--mixed_precision", "no", "--dynamo_backend", "no",
    )  # fmt: skip
