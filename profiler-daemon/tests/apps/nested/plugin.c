/* Loaded while the server runs, and called with frames of the server on either side. */

__attribute__((noinline)) void plugin(void (*back)(void))
{
    volatile char room[200];
    room[0] = 1;
    back();
    room[1] = room[0];
}
