"""Platform plugins: where SGLang asks which hardware it runs on (`sglang.srt.platforms`)."""

import os

from pascal_sglang.older_sglang import install

CPU_PLATFORM = "pascal_cpu"


def activate() -> str | None:
    """Name the reference CPU platform, but only when `SGLANG_PLATFORM` chose it by name.

    Returns None otherwise, so that SGLang's own detection is untouched by installing the package.
    """
    if os.environ.get("SGLANG_PLATFORM") == CPU_PLATFORM:
        install()  # The platform's own imports come before any other plugin.
        return "pascal_sglang.platforms.cpu.ReferenceCpuPlatform"
    return None
