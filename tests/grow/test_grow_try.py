import time
def test_it(trained_run, grow_languages):
    t=time.time(); made, said = grow_languages("az"); print("\n".join(said)); print(time.time()-t)
    t=time.time(); made, said = grow_languages("az"); print("\n".join(said)); print(time.time()-t)
    assert not made
