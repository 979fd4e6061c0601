"""The evidence: slicing and the three maintenance tasks against their rivals, on real data.

``python -m bench.study rq1`` … ``rq4`` answers one question with a table, a JSON file and a figure
in ``bench/results/study``. Every row has the number of seeds, and mean and standard deviation over
them. A seed stands for a network trained from it and for the order of images. Settings are chosen
on validation images. ``bench/runs.py`` says how an interrupted study goes on.
"""
