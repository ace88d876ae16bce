"""Compares methods from one checkpoint: forks of a run, their learning curves paired by seed, and their gradients.

command.py          reads the command line, and calls the others in this order
request.py          records of what is asked for
methods.py          the options of a run with another method's in the place of its own
forks.py            the checkpoint that all arms begin from, and the folder of an arm
arms.py             an arm: a method with a seed, its configuration, how far it has come
training.py         trains the arms one after the other; processes.py starts and stops torchrun
paired.py           differences over seeds: interval, test, seeds that a claim needs
curves.py           learning curves of arms, and what is compared of them; table.py prints it
gradient_run.py     starts gradients.py, which computes each method's gradient on one batch
gradient_report.py  norms, cosines, weights by class of token; gradient_table.py prints them
"""
