"""Imported once, where `warm` forks commands from: their parser, and the trees of verl that all of them read."""

from eaft_verl.cluster import doctor
from eaft_verl.experiment import arguments
from eaft_verl.recipe.keys import VERL_TREE
from eaft_verl.recipe.verl_keys import PPO_TREE, verl_defaults

FORKED = doctor, arguments, verl_defaults(VERL_TREE), verl_defaults(PPO_TREE)
