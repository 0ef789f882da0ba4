"""How often the models of a running server have run."""

import urllib.request


def executions(server, model):
    """How often a model has run, cache hits not counted."""
    with urllib.request.urlopen(f"http://localhost:{server.ports.metrics}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    name = f'nv_inference_exec_count{{model="{model}"'
    return sum(float(line.split()[-1]) for line in lines if line.startswith(name))
