"""The flags of the public systems miles and slime, whose launch scripts run here.

`flags.tsv` has all of them, with types, defaults and choices as they are there. A flag that is no setting here has what
is done with it: `no effect` is taken with a note, `refused` is a fault; `reason` and `remedy` are what messages say.
"""
