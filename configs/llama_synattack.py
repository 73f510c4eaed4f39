"""Llama student, SynAttack: pre-made paraphrases with :data=DIR or :scale=8b,data=DIR; offline a rule-based
`syn_template` stands in."""

from configs import common


def get_config(arg=None):
  return common.llama("syn_template", arg)
