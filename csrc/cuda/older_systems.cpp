// What the CUDA runtime within the library calls: glibc 2.34 gave these functions a new version, when it moved them
// from libpthread, libdl and librt into libc.
#include "core/older_glibc.h"

FROM_FIRST_GLIBC(dlclose, dlerror, dlopen, dlsym, dlvsym, pthread_condattr_setpshared, pthread_create, pthread_detach,
                 pthread_getspecific, pthread_join, pthread_key_create, pthread_key_delete, pthread_kill,
                 pthread_mutex_trylock, pthread_mutexattr_destroy, pthread_mutexattr_init, pthread_mutexattr_setpshared,
                 pthread_mutexattr_settype, pthread_once, pthread_rwlock_destroy, pthread_rwlock_init,
                 pthread_rwlock_rdlock, pthread_rwlock_timedrdlock, pthread_rwlock_timedwrlock,
                 pthread_rwlock_tryrdlock, pthread_rwlock_trywrlock, pthread_rwlock_unlock, pthread_rwlock_wrlock,
                 pthread_rwlockattr_destroy, pthread_rwlockattr_init, pthread_rwlockattr_setpshared,
                 pthread_setspecific, pthread_spin_destroy, pthread_spin_init, pthread_spin_lock, pthread_spin_trylock,
                 pthread_spin_unlock, sem_destroy, sem_init, sem_post, sem_timedwait, sem_trywait, sem_wait, shm_open,
                 shm_unlink);
#if defined(__x86_64__)
FROM_GLIBC("GLIBC_2.3.4", dlmopen);
#else
FROM_FIRST_GLIBC(dlmopen);
#endif
