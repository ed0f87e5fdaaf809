// Locks by the raw system call: many goroutines that count, or one holder.
package main

import (
	"fmt"
	"io"
	"os"
	"os/user" // with cgo this makes it a dynamically linked program
	"strconv"
	"sync"
	"syscall"
)

const (
	exclusive = syscall.LOCK_EX
	shared    = syscall.LOCK_SH
	try       = syscall.LOCK_NB
)

func check(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "golocks:", err)
		os.Exit(1)
	}
}

func open(path string) *os.File {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o666)
	check(err)
	return file
}

// EINTR is an error: Go's signals to its own threads have SA_RESTART.
func lock(file *os.File, operation int) error {
	return syscall.Flock(int(file.Fd()), operation)
}

func read(file *os.File) int {
	digits := make([]byte, 16)
	length, err := file.ReadAt(digits, 0)
	if err != io.EOF {
		check(err)
	}
	if length == 0 {
		return 0
	}
	number, err := strconv.Atoi(string(digits[:length]))
	check(err)
	return number
}

// Adds one under an exclusive lock; a shared one must keep the number as it is.
func turn(file *os.File, operation int) int {
	err := lock(file, operation|try)
	for err == syscall.EWOULDBLOCK {
		err = lock(file, operation)
	}
	check(err)
	number := read(file)
	if operation == exclusive {
		number++
		_, err = file.WriteAt([]byte(fmt.Sprintf("%016d", number)), 0)
		check(err)
	} else if now := read(file); now != number {
		check(fmt.Errorf("%d became %d under a shared lock", number, now))
	}
	return number
}

func count(path string, goroutines int, turns int) {
	var all sync.WaitGroup
	for i := 0; i < goroutines; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			file := open(path)
			for i := 0; i < 2*turns; i++ {
				operation := exclusive
				if i%2 == 1 {
					operation = shared
				}
				if turn(file, operation)%16 != 0 {
					check(lock(file, syscall.LOCK_UN))
				} else { // the lock ends with the description
					check(file.Close())
					file = open(path)
				}
			}
			check(file.Close())
		}()
	}
	all.Wait()
}

// Says who it is when it has the lock, unlocks at the first byte that it reads, and closes at the end.
func hold(path string) {
	file := open(path)
	check(lock(file, exclusive|try))
	whoever, err := user.Current()
	check(err)
	fmt.Println("held by", whoever.Uid)
	_, err = os.Stdin.Read(make([]byte, 1))
	check(err)
	check(lock(file, syscall.LOCK_UN))
	fmt.Println("unlocked")
	_, err = io.Copy(io.Discard, os.Stdin)
	check(err)
	check(file.Close())
}

func main() {
	switch command, path := os.Args[1], os.Args[2]; command {
	case "count":
		goroutines, err := strconv.Atoi(os.Args[3])
		check(err)
		turns, err := strconv.Atoi(os.Args[4])
		check(err)
		count(path, goroutines, turns)
	case "hold":
		hold(path)
	}
}
