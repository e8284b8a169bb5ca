//! The init of a container as a program by itself: for users of the library that have no binary
//! of their own to execute again.

fn main() {
    replicator::container::init_main()
}
