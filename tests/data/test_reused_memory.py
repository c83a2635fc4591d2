import jax
import ml_dtypes
import numpy as np

from pixart_jax.data.reused_memory import BufferPool


def address(array):
    return array.__array_interface__["data"][0]


def test_memory_comes_back_when_the_last_view_of_it_is_gone():
    pool = BufferPool()
    first = pool.empty((8, 100), ml_dtypes.bfloat16)
    assert first.shape == (8, 100) and first.dtype == ml_dtypes.bfloat16 and first.flags.writeable
    where, view = address(first), first[3:5]
    del first
    assert address(pool.empty((8, 100), np.uint16)) != where  # the view still looks at it
    del view
    assert address(pool.empty((800,), np.uint16)) == where
    assert address(pool.empty((801,), np.uint16)) != where


def test_memory_that_a_device_buffer_may_look_at_is_not_written_anew():
    pool = BufferPool()
    held = []
    for value in range(20):  # on a CPU a device array may be the very memory of the numpy array
        array = pool.empty((1024, 64), np.float32)
        array[:] = value
        held.append(jax.device_put(array))
        del array
    for value, array in enumerate(held):
        assert (np.asarray(array) == value).all()


def test_no_more_than_a_few_blocks_lie_free():
    pool = BufferPool(most=2)
    arrays = [pool.empty((1000 + i,), np.uint8) for i in range(6)]
    del arrays
    pool.empty((1,), np.uint8)
    assert len(pool._free) == 2
