"""A study for two cores: when is MixLoRA better than LoRA, by how much, and with which settings?

    mixlora study [plan | run | report | time] [--quick]

``pictures`` and ``suites`` make the data, ``base`` the model that is tuned. ``methods`` has the methods, ``tuning``
does one run, ``probes`` and ``costs`` measure other things than accuracy. ``plan`` lists the runs and their order,
``records`` reads and writes raw results, ``comparison`` does the statistics, ``report`` and ``figures`` write the
report.
"""
