// Go's net package: a goroutine for each connection, buffered both ways. Answers leave when no
// further line is waiting, so a pipelined batch costs one write.
package main

import (
	"bufio"
	"bytes"
	"log"
	"net"
	"os"
)

func answer(connection net.Conn) {
	defer connection.Close()
	reader := bufio.NewReaderSize(connection, 128*1024)
	writer := bufio.NewWriterSize(connection, 128*1024)
	for {
		line, err := reader.ReadSlice('\n')
		writer.Write(bytes.ToUpper(line))
		if reader.Buffered() == 0 && writer.Flush() != nil {
			return
		}
		if err != nil && err != bufio.ErrBufferFull {
			return
		}
	}
}

func main() {
	listener, err := net.Listen("tcp", "127.0.0.1:"+os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	for {
		connection, err := listener.Accept()
		if err != nil {
			log.Fatal(err)
		}
		go answer(connection)
	}
}
