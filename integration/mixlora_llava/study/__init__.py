"""When is MixLoRA better than LoRA, by how much, and with which settings: a study that two cores repeat.

    mixlora study [plan | run | report | time] [--quick]

``pictures`` and ``suites`` are the data, ``base`` the model that is tuned, ``methods`` what is compared, ``tuning`` one
run, ``probes`` and ``costs`` what is looked at besides accuracy, ``plan`` which runs there are and in which order,
``records`` the raw results, ``comparison`` the statistics, ``report`` and ``figures`` what a reader sees.
"""
