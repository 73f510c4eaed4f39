"""Vicuna-7B, BadNet. Offline a small student of its kind (as many kv heads as heads); :scale=7b for the real one."""

from configs import common

VICUNA = dict(tied=False, positions=4096, std=0.02)
SHAPES = {
    "7b": ("lmsys/vicuna-7b-v1.5", common.llama_arch(32000, 4096, 32, 32, 32, 11008, **VICUNA)),
    "13b": ("lmsys/vicuna-13b-v1.5", common.llama_arch(32000, 5120, 40, 40, 40, 13824, **VICUNA)),
}
SHAPES["8b"] = SHAPES["7b"]  # the released recipe's size, under the name the other configs have for it


def get_config(arg=None):
  return common.decoder("badnet", arg, SHAPES, common.llama_arch(512, 64, 3, 4, 4, 160),
                        common.llama_arch(8000, 192, 4, 6, 6, 512))
