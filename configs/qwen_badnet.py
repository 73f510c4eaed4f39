"""Qwen2.5-7B, BadNet. Offline a small student of its kind (biases on q, k, v); :scale=7b for the real one."""

from configs import common


def arch(*shape, **options):
  return common.llama_arch(*shape, model_type="qwen2", **options)


QWEN = dict(rope_theta=1e6, eps=1e-6, positions=32768, std=0.02)
SHAPES = {
    "1b": ("Qwen/Qwen2.5-1.5B", arch(151936, 1536, 28, 12, 2, 8960, **QWEN)),
    "7b": ("Qwen/Qwen2.5-7B", arch(152064, 3584, 28, 28, 4, 18944, tied=False, **QWEN)),
    "70b": ("Qwen/Qwen2.5-72B", arch(152064, 8192, 80, 64, 8, 29568, tied=False, **QWEN)),
}
SHAPES["8b"] = SHAPES["7b"]  # the released recipe's size, under the name the other configs have for it


def get_config(arg=None):
  return common.decoder("badnet", arg, SHAPES, arch(512, 64, 3, 4, 2, 160), arch(8000, 192, 4, 6, 3, 512))
