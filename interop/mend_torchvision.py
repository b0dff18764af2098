"""Let torchvision be imported beside a CPU build of torch.

Its wheel has a CUDA library that does not load then, and the import fails where it describes the operators of that
library. SGLang imports torchvision for image models only, so the descriptions of missing operators are removed.
"""

import sysconfig
from pathlib import Path

PAGE = Path(sysconfig.get_path("purelib")) / "torchvision" / "_meta_registrations.py"
HOOK = "@torch.library.register_fake("
BEFORE = "@functools.lru_cache(None)\ndef get_meta_lib"
OURS = """\
def _describe(name):
    return torch.library.register_fake(name) if torchvision.extension._has_ops() else lambda function: function


"""


def mend() -> None:
    """Patch the file.

    Raises SystemExit if the file is not the expected one.
    """
    text = PAGE.read_text()
    if "def _describe(" in text:
        return
    if HOOK not in text or text.count(BEFORE) != 1:
        raise SystemExit(f"{PAGE} is another one than that of torchvision 0.28")
    PAGE.write_text(text.replace(HOOK, "@_describe(").replace(BEFORE, OURS + BEFORE))


if __name__ == "__main__":
    mend()
