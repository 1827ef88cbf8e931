"""Data that a language model writes, of which only what can be checked is kept.

Two routes, after Yuan 2.0 (Wu et al. 2023, section 4 of the paper: its code and maths data):

    code     topic words -> a prompt -> a task, a function and its unit tests -> the tests are run (`code_route`)
    maths    problems, variations of them, arithmetic -> worked answers -> results are compared exactly (`maths_route`)

`python -m data_pipelines.synthesize` runs a route against any endpoint that speaks OpenAI's chat completions.

What can go wrong, and what is done about it. An answer is text from outside: it may be wrong, it may be broken, and it
may be meant to harm. Nothing of it is ever run in our own process or with our own rights. Python is parsed here
(`candidate`), which is not running it; where it is run, and only if that was asked for, it runs in `sandbox`. What is
kept becomes training data, so the second harm is a sample that only looks verified. Three things stand against it:

* The function never sees its tests. They run in another sandbox, and the two exchange plain values over a pipe
  (`inside`). So a function cannot read the expected value, print a result, end the process before the tests, replace
  `sys.exit` or return an object that is equal to everything.
* The tests are written in a small part of Python (`unit_tests`): assertions about calls with plain values. They cannot
  reach the program that judges them.
* Tests that would pass whatever the function does are found by putting stubs in its place: one that raises, and some
  that always return the same. A stub that passes all of the tests shows that they test nothing.

What cannot be prevented: tests and function are by the same author, so both can be wrong in the same way, and tests can
be weak in ways that no stub shows (a table of the tested values passes them). A majority among answers of one model can
be wrong, too; such rows say `"checked": "majority"`. And a sandbox is as strong as the kernel under it: run this on a
machine that holds nothing you cannot lose.
"""
